"""What the commands do, a file each; `agents.cli` reads the command line and calls them."""
