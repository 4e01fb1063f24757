"""What machine this is, what a model is, how an engine is built for it and executes."""
