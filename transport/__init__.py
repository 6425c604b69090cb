"""How bytes travel: message codec, certificates, the link's definition."""
