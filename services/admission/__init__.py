"""The front door: validates, tokenises, promises, streams tokens back."""
