"""The parts of `make gpu-check`: what is there, what is measured, and the file that findings are kept in."""
