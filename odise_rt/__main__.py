"""``python -m odise_rt`` is the command line of :mod:`odise_rt.cli`."""

from odise_rt.cli import run

if __name__ == "__main__":
    run()
