"""Workers as Ray actors: started, restarted, drained, scaled."""
