"""The desk: one scene, many instructions, made of MetaWorld's things and arm."""
