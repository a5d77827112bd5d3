"""Gradients watched while a model trains: see `watcher`."""
