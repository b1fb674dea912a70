"""Flow matching: the path, the timesteps, the few-step solver. Pure functions.

Conventions: x_t = (1 - t) clean + t noise, velocity = noise - clean, t in [0, 1].
"""
