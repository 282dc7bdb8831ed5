"""What names, layouts and configs of each checkpoint format mean. How bytes lie in files is not known here."""
