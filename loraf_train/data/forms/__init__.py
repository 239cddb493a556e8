"""The forms in which records state what is asked and what is answered, and how each becomes a prompt and a completion.

forms.py                  which form a record has; form.py is what all forms have in common
chat, chat_template,
messages                  conversations
text.py                   the text of a field's value; doubts.py: text that is perhaps not the one that was meant
lori.py                   prompts as in the authors' later code
"""
