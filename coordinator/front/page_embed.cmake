# Turns a file into a C array: cmake -DIN=page.html -DOUT=page_html.c -DNAME=page_html -P page_embed.cmake
file(READ ${IN} hex HEX)
string(LENGTH "${hex}" digits)
math(EXPR bytes "${digits} / 2")
string(REGEX REPLACE "([0-9a-f][0-9a-f])" "0x\\1," items "${hex}")
file(WRITE ${OUT} "/* Made from ${NAME}; see page_embed.cmake. */\nextern const char ${NAME}[];\nextern const unsigned ${NAME}_bytes;\nconst char ${NAME}[] = {${items}0};\nconst unsigned ${NAME}_bytes = ${bytes};\n")
