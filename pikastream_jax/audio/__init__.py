"""Waveform to aligned audio tokens: log-mel analysis and the causal audio encoder."""
