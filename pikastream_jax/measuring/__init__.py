"""How good the generated faces are: image measures, lip sync, identity, drift and prompt adherence.

Nothing that streams imports this package. It may import the renderer, whose truth it compares with.
"""
