"""Native kernels of operations; nothing here is imported before a tensor needs it (see ``ops.native``)."""
