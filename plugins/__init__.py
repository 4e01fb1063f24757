"""GPU kernels in Triton and Gluon, and the one function that compiles them ahead of time. Imports nothing of farrier.

Only a build imports the kernels: what serves an engine sees compiled code, never Triton.
"""
