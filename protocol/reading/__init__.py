"""What a caller writes, as a line or in a task, read as Requests; what is wrong is an InvalidRequest that names it."""
