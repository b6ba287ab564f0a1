"""From a traced graph to what is stored and run."""
