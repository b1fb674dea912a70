"""The stream: explicit state, one jitted step, and the session around them."""
