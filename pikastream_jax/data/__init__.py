"""Procedural talking faces and, later, real video: what the training stages learn from."""
