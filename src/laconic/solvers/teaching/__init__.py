"""Learning from a teacher: options, objective, teachers, what stands beside while it trains."""
