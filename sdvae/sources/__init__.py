"""Where photos come from: folders, archives, lists, tables, memory."""
