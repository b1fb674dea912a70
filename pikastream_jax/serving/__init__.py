"""From files and pipes to the generator and from its frames to a stream: decode, resample, encode, mux, send.

Serving knows the generator only by the protocol in `pipeline`, and never imports the renderer or training data.
"""
