"""What engines are fed with and what their outputs mean: arrays, text, and generation token by token."""
