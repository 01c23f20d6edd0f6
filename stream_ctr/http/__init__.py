"""HTTP for commands that listen: an address, who may ask, and a server in a thread."""
