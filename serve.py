"""Speech and one picture in, a talking face out: `python serve.py --audio speech.wav --image face.png | ffplay -`."""

import sys

from pikastream_jax.serving.command import main

if __name__ == "__main__":
    sys.exit(main())
