"""How farrier's bundled demo model is made: its text, its tokenizer, its training and its evaluation."""
