"""One module a stage; each reads files and writes files, and none imports another."""
