"""Side-by-side benchmarks of Polyvisor and its peers. `python -m bench` runs them all; README.md says how to read them."""
