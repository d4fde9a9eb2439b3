"""Adapters: functions applied to a plain model, and the file formats that carry them."""
