"""From the arguments of a user to a call record, and the public functions.

`read` makes the record, `run` chooses and runs; the other modules are the functions of each family.
"""
