"""What a bank holds, and its file: plain tensors, read and written by namespace. It knows neither models nor streams."""
