"""What is loaded into other people's servers: single files that need only the standard library."""
