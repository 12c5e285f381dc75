"""Other people's call signatures over strobe.attention: change an import, keep the code."""
