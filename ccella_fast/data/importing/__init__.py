"""`ccella-fast import`: from a PACS export to a folder of studies that `prepare` reads."""
