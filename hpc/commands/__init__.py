"""The commands of `equihpc`, by topic."""
