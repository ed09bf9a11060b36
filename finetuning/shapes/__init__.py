"""A small world of captioned shapes: the test bed on which learning and forgetting can be read off exactly."""
