from cctorch.cli import entry

entry()
