"""The specification: plain torch, any device, any float dtype. Slow and obvious on purpose."""
