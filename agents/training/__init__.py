"""What is no algorithm: experiment, loop, evaluation, report, checkpoints, logging, seeding."""
