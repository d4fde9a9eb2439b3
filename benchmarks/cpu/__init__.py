"""CPU timing: ratios against named contenders, measured interleaved."""
