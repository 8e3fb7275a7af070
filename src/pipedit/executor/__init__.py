"""Starting ranks and calling them: in this process, in child processes, or where a launcher put them; one contract."""
