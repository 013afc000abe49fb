"""Dictionaries: load, train, encode, decode, select features. Nothing here knows what forgetting is."""
