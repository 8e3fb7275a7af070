"""Starting ranks and calling them: in this process, later in local processes or elsewhere; one contract for all."""
