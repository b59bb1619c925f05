"""Code for other people's servers: single files that need nothing but Python and that server."""
