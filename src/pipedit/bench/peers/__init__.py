"""Programs that are measured against each other. Each is run as a process of its own and speaks JSON lines."""
