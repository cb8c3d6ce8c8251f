"""Result in, page, tables and JSON out."""
