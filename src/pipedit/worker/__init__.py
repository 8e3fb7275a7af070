"""One rank's life: load the parts its roles need, run commands, report events and spans."""
