"""Speed and memory, beside the peers, in the same minutes: `python -m bench --help`."""
