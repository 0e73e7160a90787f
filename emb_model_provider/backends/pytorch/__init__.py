"""The torch backend. Imported only if torch serves a model."""
