"""The C core: a raw io_uring and the queue engine, with the driver's ABI."""
