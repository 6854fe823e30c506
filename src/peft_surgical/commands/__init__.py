"""The commands of ``peft-surgical``: a module each, with one function that reads arguments, calls, and prints."""
