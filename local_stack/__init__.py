"""Everything a newcomer needs beside the trainer, on one machine: environment, inference server, launcher."""
