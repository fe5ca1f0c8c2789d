"""What a run needs beside an algorithm: experiment, loop, evaluation, report, checkpoints, logging, signals."""
